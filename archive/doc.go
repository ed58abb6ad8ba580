// Package archive turns layers into files and back.
//
// A layer is a tar archive, plain or compressed with gzip or zstd, in the form of the image
// specification's "Image Layer Filesystem Changeset". [Apply] writes one into a directory and
// tells its diff ID, the digest of the uncompressed archive; [Diff] writes the layer that makes
// one directory of another; [ChainID] computes the name of a stack of layers.
//
// Layers are hostile input. Apply cleans names to relative ones, and the kernel resolves them: every name is
// used as a single component below a directory that is held open, symbolic links that lead to
// a parent directory are followed inside the target only, and the kernel is told to refuse
// anything else (openat2 with RESOLVE_BENEATH and RESOLVE_NO_SYMLINKS, or one O_NOFOLLOW
// open a component where that call is missing).
package archive
