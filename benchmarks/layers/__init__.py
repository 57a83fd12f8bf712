"""A model's layers as a list and as a `LayerStack`, on this machine's CPU."""
