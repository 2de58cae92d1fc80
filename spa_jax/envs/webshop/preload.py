"""What all environment processes share: the fork server imports this before it forks them."""

from spa_jax.envs.webshop import engine, search

__all__ = ["engine"]
search.load_bm25s()
