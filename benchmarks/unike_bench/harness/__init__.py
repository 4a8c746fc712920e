"""How it is measured: interleaved, checked first, beside the roofline."""
