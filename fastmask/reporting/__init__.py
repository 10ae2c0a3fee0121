"""Pages about training runs: what their folders hold, charts as inline SVG, one self-contained HTML file."""
