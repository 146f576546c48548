"""Programs that people run beside a training: other people's weights made ours."""
