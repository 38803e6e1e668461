"""Attention and other products that the network and its sampler are computed by, for each kind of device."""
