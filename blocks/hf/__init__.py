"""All that depends on a release of transformers; nothing else of the project imports it.

`release`   is the installed release as it is known here? Asked before anything is loaded
`models`    configs, model classes, the causal model of a config
`forwards`  what a family's forward calls its arguments
`caches`    the kinds of layers of a cache, what each keeps
`attention` how attention is exchanged
`rotary`    scalings of positions that go by the length of a text
`loading`   from a checkpoint's names to a filled model; `quantizing` does it quantized

1. A difference between releases is chosen by feature (a signature, an attribute), never by number.
2. What is not as known raises `Unsupported` by name. Nothing is left out silently.
"""
