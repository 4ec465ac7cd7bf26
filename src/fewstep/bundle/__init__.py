"""What a bundle is: its folder, manifest, contract, schedule, samples and where it came from. Needs no torch."""
