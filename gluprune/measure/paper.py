"""Constants of the published study (arXiv 2512.22671) that several packages use."""

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)  # shares of the MLP neurons removed
