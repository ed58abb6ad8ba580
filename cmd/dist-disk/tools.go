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

// A tool is a program that makes a file system of a tar archive on its standard input, in the file with the descriptor 3.
type tool struct {
	name, wanted string
	least        int // minor number of the first version 1 that will do, 0 for any
	reads        erofs.TarOptions
	args         []string
	env          []string
}

const (
	target     = "/dev/fd/3"
	maxMessage = 4 << 10 // bytes kept of what a program says
)

// run lets the program make the file out.
func (t tool) run(ctx context.Context, out *os.File, b *erofs.Builder, s settings) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	c := exec.CommandContext(ctx, s.program, t.args...)
	// The bytes must not depend on what a user has set for the programs.
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

// message keeps the beginning of what a program says.
type message struct{ bytes.Buffer }

func (m *message) Write(b []byte) (int, error) {
	m.Buffer.Write(b[:min(len(b), maxMessage-m.Len())])
	return len(b), nil
}

// squashfs is made by tar2sqfs. It has attributes of three classes, and times in whole seconds that are counted from 1970 on, in 32 bits.
func squashfs(s settings) tool {
	args := []string{"-q", "-f", "-s", "-c", cmp.Or(s.compress, "zstd")}
	if args[4] == "zstd" {
		args = append(args, "-X", "level=9") // the default of 15 takes several times as long, for files that are some hundredths smaller
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

// compressed makes an EROFS image whose files' data are compressed, by mkfs.erofs. A file's data are compressed in
// clusters of up to 64 KiB. The kernel decompresses a whole cluster to read a part of it, but smaller clusters make larger images. mkfs.erofs
// does not undo the escapes in an attribute's name, and before version 1.9.3 it misreads fractions of seconds (see TarOptions.NineDigits).
func compressed(s settings) tool {
	return tool{
		name: "mkfs.erofs", wanted: "mkfs.erofs 1.8 or later (package erofs-utils)", least: 8,
		reads: erofs.TarOptions{NineDigits: true, Latest: math.MaxInt64, Holds: func(_ []layer.Xattr, x layer.Xattr) bool {
			return layer.EscapeName(x.Name) == x.Name
		}},
		// Without --mkfs-time, -T would be the time of all files. SOURCE_DATE_EPOCH would bound their times.
		args: []string{"-d0", "--quiet", "--tar=f", "-z" + s.compress, "-b4096", "-C65536", "-T0", "--mkfs-time",
			fmt.Sprintf("-U%x-%x-%x-%x-%x", s.id[:4], s.id[4:6], s.id[6:8], s.id[8:10], s.id[10:]), target},
	}
}
