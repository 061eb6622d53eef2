"""A curriculum of real and synthetic sounds with questions, for training a model that listens.

`plans` has the clips of all groups, `maker` renders them and writes the manifests; the topics are `scenes` and `digits`
(real recordings, read by `recordings`), `speech` (`voices`, `grammar`, `words`) and `music` (`midi`), with `effects`,
`questions`, `splits` and `programs` for all.
"""
