"""What the commands in the folder above share; nothing in here is a command.

cases, sets, data       a call of a layer, the named sets of them, and their inputs
providers, loop, onnx_layer, precision
                        who computes a layer, and what several of them need for it
runner, memory          times and peaks of memory of all providers on a case
ceiling, gpu_ceiling    what the machine can do at most
results, targets        what a run found, as JSON, and what it is held to
report, plots, captions how it is shown
turns                   tables of some ways of doing one thing, which take turns
"""
