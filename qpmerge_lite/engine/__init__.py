"""A pass over a model: forwards of the real model in lockstep, and what its layers read on the
way."""
