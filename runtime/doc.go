// Package runtime runs OCI bundles with an OCI runtime (runc or crun), without a daemon. Package
// [distkit/runtime/spec] makes the configuration of a bundle from that of an image.
//
// [Runtime] finds the runtime program and runs a bundle in the foreground; what it must remember while the
// container lives is in its state directory, and a dead process leaves nothing there that the
// next one with the same ID does not clean up.
package runtime
