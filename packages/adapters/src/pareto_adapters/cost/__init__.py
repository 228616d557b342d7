"""What tuners cost, measured in one run: ``python -m pareto_adapters.cost --out DIR``.

Three tables. *Layers*: forward and backward of one frozen linear layer, alone and with an adapter beside it, at several
widths; the Kronecker product factorised and formed in each forward pass, LoRA of several ranks, and a merged adapter.
*Latency*: whole models by the protocol of the KronA chapter's section 4.4.3, beside its table 4.6. *Memory*, on a GPU:
the peak of training each tuner. Nothing is timed before its answer was checked.
"""
