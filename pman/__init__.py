"""pman: runs ChRIS jobs on Slurm clusters, and says truthfully what became of them."""

__version__ = "0.1.0"
