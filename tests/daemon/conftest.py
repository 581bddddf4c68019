"""Fixtures of the daemon tests."""

from tests.grpc_runtime import grpc_runtime

__all__ = ["grpc_runtime"]
