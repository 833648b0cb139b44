"""The guard over HTTP: `rm-ood serve`, or `rm_ood.serve.app.build_app` for an application of one's own (extra `serve`)."""
