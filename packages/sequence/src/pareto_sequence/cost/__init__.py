"""What the models cost, measured in one run: ``python -m pareto_sequence.cost --out DIR``.

Four tables. *convolution*: the depthwise dilated convolution by the package's own kernel, by torch's and by FFT, over
lengths and dilations. *ema*: the damped moving average by FFT and by its truncated kernel. *models*: TCNCA beside
MEGA-chunk as in Figs. 7.5 to 7.7 of the chapter, over lengths, widths and EMA states, encoding and decoding, with the
time of the blocks without their mixer, which bounds what any mixer can gain. *tokens*: time per token over lengths.

Forward is the pass that training runs (it keeps what backward needs), backward the gradient of every parameter. Cases
are timed in turns, after their answers were compared; ratios are of medians, with 95 % bootstrap intervals over turns.
"""
