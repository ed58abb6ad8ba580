package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"os/exec"
	"strings"

	"distkit/erofs"
	"distkit/errclass"
	"distkit/layer"

	"golang.org/x/sys/unix"
)

// A tool is a program that reads a tar archive on its standard input, and makes a file system in the file with
// descriptor 3.
type tool struct {
	name, wanted string
	least        int // minor number of the oldest version 1 that works; 0 for any
	reads        erofs.TarOptions
	args         []string
	env          []string
}

const (
	target     = "/dev/fd/3"
	maxMessage = 4 << 10 // how much of a program's messages is kept
)

// run lets the program make the file system in out.
func (t tool) run(ctx context.Context, out *os.File, b *erofs.Builder, s settings) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	c := exec.CommandContext(ctx, s.program, t.args...)
	// The result must not depend on variables that a user has set for the program.
	c.Env = append([]string{"PATH=" + os.Getenv("PATH"), "LD_LIBRARY_PATH=" + os.Getenv("LD_LIBRARY_PATH"),
		"TMPDIR=" + cmp.Or(s.scratch, os.TempDir())}, t.env...)
	c.ExtraFiles = []*os.File{out}
	var said message
	c.Stderr = &said
	in, err := c.StdinPipe()
	if err != nil {
		return err
	}
	if err := c.Start(); err != nil {
		return err
	}
	written := b.WriteTar(ctx, in, t.reads)
	if cerr := in.Close(); written == nil {
		written = cerr
	}
	if written != nil && !errors.Is(written, unix.EPIPE) {
		cancel()
		_ = c.Wait()
		return written
	}
	if err := c.Wait(); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return fmt.Errorf("%s: %w: %s", t.name, err, errclass.OneLine(said.String()))
	}
	return written
}

// message keeps the beginning of a program's messages.
type message struct{ bytes.Buffer }

func (m *message) Write(b []byte) (int, error) {
	m.Buffer.Write(b[:min(len(b), maxMessage-m.Len())])
	return len(b), nil
}

// squashfs returns tar2sqfs. It supports attributes of three classes, and times in whole seconds since 1970, in 32
// bits.
func squashfs(s settings) tool {
	args := []string{"-q", "-f", "-s", "-c", cmp.Or(s.compress, "zstd")}
	if args[4] == "zstd" {
		args = append(args, "-X", "level=9") // the default, 15, takes several times as long for files a few percent smaller
	}
	return tool{
		name: "tar2sqfs", wanted: "tar2sqfs (package squashfs-tools-ng)",
		reads: erofs.TarOptions{Latest: math.MaxUint32, Holds: func(_ []layer.Xattr, x layer.Xattr) bool {
			class, _, _ := strings.Cut(x.Name, ".")
			return class == "user" || class == "trusted" || class == "security"
		}},
		args: append(args, target),
		env:  []string{"SOURCE_DATE_EPOCH=0"},
	}
}

// compressed returns mkfs.erofs, for an EROFS image with compressed data. A file's data are compressed in clusters of
// up to 64 KiB. To read a part of a cluster, the kernel decompresses the whole; smaller clusters make larger images.
// mkfs.erofs does not unescape the names of attributes, and before version 1.9.3 it misreads fractions of seconds (see
// TarOptions.NineDigits).
func compressed(s settings) tool {
	return tool{
		name: "mkfs.erofs", wanted: "mkfs.erofs 1.8 or later (package erofs-utils)", least: 8,
		reads: erofs.TarOptions{NineDigits: true, Latest: math.MaxInt64, Holds: func(_ []layer.Xattr, x layer.Xattr) bool {
			return layer.EscapeName(x.Name) == x.Name
		}},
		// Without --mkfs-time, -T would set the time of all files. SOURCE_DATE_EPOCH would limit their times.
		args: []string{"-d0", "--quiet", "--tar=f", "-z" + s.compress, "-b4096", "-C65536", "-T0", "--mkfs-time",
			fmt.Sprintf("-U%x-%x-%x-%x-%x", s.id[:4], s.id[4:6], s.id[6:8], s.id[8:10], s.id[10:]), target},
	}
}
