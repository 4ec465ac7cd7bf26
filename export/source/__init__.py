"""Where a generator comes from: folders, single files, the hub; weights, LoRAs and other parts laid over it."""
