// Dist-cat writes blobs to standard output.
package main

import (
	"context"
	"fmt"
	"io"
	"math"

	"distkit/cmd/internal/cli"
	"distkit/content"
	"distkit/errclass"
	"distkit/image"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

func main() { cli.Main(newCommand()) }

func newCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "dist-cat [flags] DIGEST|NAME…",
		Short: "write blobs to standard output",
		Args:  cobra.ArbitraryArgs,
	}
	f := c.Flags()
	root, namespace := cli.Root(f), cli.Namespace(f)
	platform := f.String("platform", "", "of an index write the manifest for `PLATFORM`, as linux/amd64")
	offset := f.Int64("offset", 0, "leave out the first `N` bytes of each blob")
	length := f.Int64("length", math.MaxInt64, "write at most `N` bytes of each blob")
	f.Lookup("length").DefValue = "0" // hide the default from help
	follow := f.BoolP("follow", "f", false, "write blobs that are being ingested, too, as their bytes arrive")
	wait := f.BoolP("wait", "w", false, "with --follow: wait for an ingest that has not begun, or has lost its process")
	pid := f.Int("pid", 0, "with --wait: only while the process `PID` lives")
	c.RunE = func(c *cobra.Command, args []string) error {
		if *offset < 0 || *length < 0 {
			return cli.Usagef("--offset and --length are not negative")
		}
		if *follow && (f.Changed("offset") || f.Changed("length")) {
			return cli.Usagef("--follow writes whole blobs: it goes with neither --offset nor --length")
		}
		if *wait && !*follow {
			return cli.Usagef("--wait goes with --follow")
		}
		if f.Changed("pid") && (!*wait || *pid <= 0) {
			return cli.Usagef("--pid goes with --wait, and is above 0")
		}
		s, err := content.Open(*root)
		if err != nil {
			return err
		}
		names, err := image.OpenNames(s, *namespace)
		if err != nil {
			return err
		}
		w := image.Walker{Store: s}
		if *platform != "" {
			if w.Platform, err = image.ParsePlatform(*platform); err != nil {
				return err
			}
		}
		finder := image.Finder{Names: names}
		var waits func() bool
		if *wait {
			waits = func() bool { return true }
		}
		if *pid != 0 {
			waits = alive(*pid)
		}
		if *follow {
			cli.DieWithReader()
		}
		return cli.Each(c, args, func(object string) error {
			dgst, err := find(c.Context(), &finder, w, object)
			if err != nil {
				return err
			}
			if *follow {
				return s.Follow(c.Context(), dgst, flushed{c}, waits)
			}
			return write(c.OutOrStdout(), s, dgst, *offset, *length)
		})
	}
	return c
}

// exists returns a function that reports whether there is a process with that ID.
func exists(pid int) func() bool {
	return func() bool { return unix.Kill(pid, 0) != unix.ESRCH }
}

// flushed writes to standard output and flushes it after each write.
type flushed struct{ c *cobra.Command }

func (f flushed) Write(p []byte) (int, error) {
	n, err := f.c.OutOrStdout().Write(p)
	if err == nil {
		err = cli.Flush(f.c)
	}
	return n, err
}

func (f flushed) ReadFrom(r io.Reader) (int64, error) {
	n, err := io.Copy(f.c.OutOrStdout(), r)
	if err == nil {
		err = cli.Flush(f.c)
	}
	return n, err
}

// find returns the digest of the blob to write.
func find(ctx context.Context, f *image.Finder, w image.Walker, object string) (digest.Digest, error) {
	img, err := f.Find(ctx, object)
	d := img.Target
	if err == nil && w.Platform != nil {
		d, err = w.Manifest(ctx, d)
	}
	return d.Digest, err
}

// write writes part of a blob: at most length bytes from offset on. The offset must not be beyond the end.
func write(out io.Writer, s *content.Store, dgst digest.Digest, offset, length int64) error {
	f, err := s.File(dgst)
	if err != nil {
		return err
	}
	defer f.Close()
	if offset > f.Size() {
		return errclass.Errorf(errdefs.ErrInvalidArgument, "--offset %d is beyond the %d bytes of %s", offset, f.Size(), dgst)
	}
	var n int64
	if _, err = f.Seek(offset, io.SeekStart); err == nil {
		n, err = io.Copy(out, io.LimitReader(f.File, length))
	}
	if err == nil && n != min(length, f.Size()-offset) {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", dgst, err)
	}
	return nil
}
