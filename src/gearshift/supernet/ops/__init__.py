"""The delta rules and their helpers: a naive twin beside each fast backend."""
