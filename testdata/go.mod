module distkit/testdata

go 1.26.0

require (
	github.com/hanwen/go-fuse/v2 v2.12.1
	github.com/klauspost/compress v1.20.3
	github.com/olareg/olareg v0.2.2
	github.com/rogpeppe/go-internal v1.16.0
	golang.org/x/crypto v0.53.0
	golang.org/x/sys v0.49.0
	mvdan.cc/sh/v3 v3.14.1
)

require (
	github.com/goccy/go-yaml v1.19.2 // indirect
	github.com/sudo-bmitch/oci-digest v0.1.2 // indirect
	golang.org/x/tools v0.38.0 // indirect
)
