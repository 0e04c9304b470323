"""The tuned model behind an endpoint that speaks OpenAI's chat completions. Answers are those of `chat`."""
