"""What tests share: tiny networks, bundles, the zoo of families."""
