package main

import (
	"context"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"

	"distkit/erofs"
	"distkit/errclass"
)

// A format is a kind of files that an image can be written as.
type format struct {
	methods []string // of compression
	sized   bool     // a size can be chosen
	write   func(ctx context.Context, w io.Writer, b *erofs.Builder, s settings) error
	tool    func(s settings) tool // makes the file where write is nil or a method is chosen
}

var formats = map[string]format{
	"erofs": {write: func(ctx context.Context, w io.Writer, b *erofs.Builder, _ settings) error { return b.Write(ctx, w) }},
	"ext4": {sized: true, write: func(ctx context.Context, w io.Writer, b *erofs.Builder, s settings) error {
		return b.WriteExt4(ctx, w, s.size)
	}},
	"squashfs": {methods: []string{"gzip", "lz4", "xz", "zstd"}, tool: squashfs},
	"tar": {write: func(ctx context.Context, w io.Writer, b *erofs.Builder, _ settings) error {
		return b.WriteTar(ctx, w, erofs.TarOptions{})
	}},
}

func formatNames() string { return strings.Join(slices.Sorted(maps.Keys(formats)), ", ") }

// settings are what a user chose, and what is known of the image.
type settings struct {
	format   string
	compress string
	size     int64
	program  string // path of the tool, "" if none is needed
	scratch  string // directory of temporary files
}

// lookup finds the program that the format needs, if it needs one. NotImplemented if there is none.
func (s *settings) lookup() (err error) {
	f := formats[s.format]
	if f.write != nil && s.compress == "" {
		return nil
	}
	t := f.tool(*s)
	s.program, err = exec.LookPath(t.name)
	if err != nil { // Debian has some where an ordinary user has no PATH to it
		s.program, err = exec.LookPath(filepath.Join("/usr/sbin", t.name))
	}
	if err != nil {
		return errclass.Errorf(errdefs.ErrNotImplemented, "--format %s takes %s", s.format, t.wanted)
	}
	return nil
}

// write writes an image to w. If that is strict, nothing is written of an image that the format can't hold.
func (s settings) write(ctx context.Context, w io.Writer, b *erofs.Builder) error {
	f := formats[s.format]
	if s.program == "" {
		return f.write(ctx, w, b, s)
	}
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
