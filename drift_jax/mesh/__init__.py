"""`drift mesh`: what a config's mesh and sharding rules make of a model, before anything is loaded or compiled."""
