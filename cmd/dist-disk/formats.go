package main

import (
	"context"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"

	"distkit/erofs"
	"distkit/errclass"
)

// A format is a kind of file that an image can be written as.
type format struct {
	methods []string // of compression
	sized   bool     // --size is allowed
	write   func(ctx context.Context, w io.Writer, b *erofs.Builder, s settings) error
	tool    func(s settings) tool // used if write is nil, or if a method of compression is chosen
}

var formats = map[string]format{
	"erofs": {
		methods: []string{"deflate", "libdeflate", "lz4", "lz4hc", "lzma", "zstd"}, tool: compressed,
		write: func(ctx context.Context, w io.Writer, b *erofs.Builder, _ settings) error { return b.Write(ctx, w) },
	},
	"ext4": {sized: true, write: func(ctx context.Context, w io.Writer, b *erofs.Builder, s settings) error {
		return b.WriteExt4(ctx, w, s.size)
	}},
	"squashfs": {methods: []string{"gzip", "lz4", "xz", "zstd"}, tool: squashfs},
	"tar": {write: func(ctx context.Context, w io.Writer, b *erofs.Builder, _ settings) error {
		return b.WriteTar(ctx, w, erofs.TarOptions{})
	}},
}

func formatNames() string { return strings.Join(slices.Sorted(maps.Keys(formats)), ", ") }

// settings are the user's choices, and properties of the image.
type settings struct {
	format   string
	compress string
	size     int64
	program  string   // path of the tool, "" if none is needed
	scratch  string   // directory for temporary files
	id       [16]byte // for the file system that a tool makes
}

// lookup finds the program that the format needs, if any. NotImplemented: there is none, or its version is too old.
func (s *settings) lookup(ctx context.Context) (err error) {
	f := formats[s.format]
	if f.write != nil && s.compress == "" {
		return nil
	}
	t := f.tool(*s)
	s.program, err = exec.LookPath(t.name)
	if err != nil { // Debian puts some in /sbin, which is not on an ordinary user's PATH
		s.program, err = exec.LookPath(filepath.Join("/usr/sbin", t.name))
	}
	if err != nil {
		return errclass.Errorf(errdefs.ErrNotImplemented, "%s takes %s", s.asked(), t.wanted)
	}
	if t.least == 0 {
		return nil
	}
	said, err := exec.CommandContext(ctx, s.program, "-V").Output()
	if err != nil {
		return fmt.Errorf("%s: %w", t.name, err)
	}
	if v := version.FindSubmatch(said); v == nil {
		return fmt.Errorf("%s: it tells no version", t.name)
	} else if minor, _ := strconv.Atoi(string(v[2])); string(v[1]) == "1" && minor < t.least {
		return errclass.Errorf(errdefs.ErrNotImplemented, "%s takes %s: this one is %s", s.asked(), t.wanted, v[0])
	}
	return nil
}

var version = regexp.MustCompile(`\b([0-9]{1,4})\.([0-9]{1,4})\b`)

// asked returns the flags that make a tool necessary.
func (s settings) asked() string {
	if formats[s.format].write == nil {
		return "--format " + s.format
	}
	return "--format " + s.format + " --compress"
}

// write writes an image to w. If b is strict, it writes nothing unless the format can hold the whole image.
func (s settings) write(ctx context.Context, w io.Writer, b *erofs.Builder) error {
	f := formats[s.format]
	if s.program == "" {
		return f.write(ctx, w, b, s)
	}
	s.id = b.UUID(s.format + " " + s.compress)
	if out, ok := w.(*os.File); ok {
		return f.tool(s).run(ctx, out, b, s)
	}
	out, err := os.CreateTemp(s.scratch, "dist-disk-*")
	if err != nil {
		return err
	}
	defer out.Close()
	if err := os.Remove(out.Name()); err != nil {
		return err
	}
	if err := f.tool(s).run(ctx, out, b, s); err != nil {
		return err
	}
	_, err = io.Copy(w, interrupted{ctx, io.NewSectionReader(out, 0, 1<<62)})
	return err
}

// interrupted reads until ctx is done.
type interrupted struct {
	ctx context.Context
	r   io.Reader
}

func (i interrupted) Read(b []byte) (int, error) {
	if err := i.ctx.Err(); err != nil {
		return 0, err
	}
	return i.r.Read(b)
}
