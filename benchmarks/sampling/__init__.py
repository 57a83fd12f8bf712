"""What drawing a token costs: `paged.runtime.sample` beside a draw that ranks the whole vocabulary."""
