// Package erofs makes EROFS images of layers: file systems that Linux mounts read-only, from a file or a block device.
//
// A [Builder] applies layers to a tree in memory, as package archive applies them to a directory, and then writes that tree as an
// image. It needs no privileges, since owners, devices and attributes are bytes in a file. The same layers give the same bytes.
//
// There are two kinds of images. One is complete: it holds all files' data, in blocks of 4096 bytes. The other is an index: it holds
// metadata only, in blocks of 512 bytes as those of a tar archive are, and its files' data are ranges of the layers' plain archives,
// which are given to the kernel as further devices. The format is described in the kernel's Documentation/filesystems/erofs.rst and
// fs/erofs/erofs_fs.h.
//
// A tree can also be written as an ext4 file system, and as a tar archive, of which other programs make file systems. For ext4, mke2fs of
// e2fsprogs 1.47.2 was tried first. Of an archive it takes no attribute but security.capability and no nanoseconds, and versions before
// 1.47.1 take no archive.
//
// The writer is our own. github.com/erofs/go-erofs (v0.3.1) was tried first: it has no hard links, takes names that are UTF-8
// only, cuts long extended attributes silently, needs an output that seeks, holds 1 KB of memory for a file, and its merge lets a
// whiteout delete what the same layer brought.
package erofs
