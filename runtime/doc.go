// Package runtime turns an image's configuration into an OCI runtime bundle's, and runs
// bundles with an OCI runtime (runc or crun), without a daemon.
//
// [Spec] is a pure function of an image configuration and the caller's wishes. [Runtime] finds
// the runtime program and runs a bundle in the foreground; what it must remember while the
// container lives is in its state directory, and a dead process leaves nothing there that the
// next one with the same ID does not clean up.
package runtime
