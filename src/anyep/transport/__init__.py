"""Step 4, how bytes move: arenas that peers can address, and words that say when."""
