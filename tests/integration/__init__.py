"""Tests of whole builds."""
