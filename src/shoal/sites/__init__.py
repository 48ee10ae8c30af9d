"""Sites on this machine: what they are, how they are started and watched, and how they talk with the server."""

from shoal.sites.spec import Site
from shoal.sites.state import Deadlines

__all__ = ["Deadlines", "Site"]
