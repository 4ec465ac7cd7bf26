"""Puts a bundle and the web app that runs it into one folder, or serves both.

The app is built from apps/web (`make app-build`) and ships here, in ``static``: using it takes no Node.
"""

from __future__ import annotations

from fewstep.app.collect import Collector
from fewstep.app.serve import AppServer, Certificate, run
from fewstep.app.site import Site, write_site

__all__ = ["AppServer", "Certificate", "Collector", "Site", "run", "write_site"]
