// Package runtime runs OCI bundles with an OCI runtime (runc or crun), without a daemon. Package
// [distkit/runtime/spec] makes a bundle's configuration from an image's.
//
// [Runtime] finds the runtime program and runs a bundle in the foreground. What it must remember while the
// container lives is in its state directory. If it dies, the next run with the same ID cleans up what it has
// left there.
package runtime
