"""The embedded engine: a supernet served by one thread, with the API of OpenAI; for laptops and tests."""

from gearshift.serve.embedded.cache_size import cache_bytes
from gearshift.serve.embedded.engine import EngineSettings
from gearshift.serve.embedded.server import GRACE_SECONDS, EmbeddedServer, listen

__all__ = ["GRACE_SECONDS", "EmbeddedServer", "EngineSettings", "cache_bytes", "listen"]
