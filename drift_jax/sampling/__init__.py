"""Where chosen responses come from: one abstract sampler, interchangeable engines."""
