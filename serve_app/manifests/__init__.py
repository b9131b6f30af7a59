"""Kubernetes manifests of a configuration, for KubeRay, as a kustomize base with components and overlays.

Knows nothing of a running cluster: a configuration file goes in, files come out.
"""
