"""Captured launches of a forward, a vision tower's or half a VAE's: when to capture, when a capture still holds, and
what to do without.

A tower of 32 layers is some two thousand launches, for which a card waits 75 to 88 % of the time at one image of 256 to
784 patches (H200). A CUDA graph is one launch.
"""
