"""INT4 quantisation of decoders, and a native runtime that generates with them on x86 CPUs."""
