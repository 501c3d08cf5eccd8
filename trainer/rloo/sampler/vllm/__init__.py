"""Rollouts by vLLM servers: sampling over HTTP, publishing weights to the servers, sampling ahead of the trainer."""
