"""Real sites: shoal's federation over the messages of Flower and NVFlare."""
