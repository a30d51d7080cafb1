"""What a model holds and costs, in named units: parameters, zeros, bytes, MACs, latency. Pure torch, for any module."""
