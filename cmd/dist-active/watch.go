package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"distkit/cmd/internal/cli"
	"distkit/cmd/internal/progress"
	"distkit/content"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// object is an expected blob.
type object struct {
	progress.Object
	digest digest.Digest
}

// watch follows the blobs whose descriptors come on standard input until that has ended and the store has all of them.
// It draws on standard error if that is a terminal.
func watch(ctx context.Context, s *content.Store) error {
	expected, failed := make(chan object), make(chan error, 1)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		defer close(expected)
		failed <- readExpected(ctx, expected)
	}()

	var objects []*object
	var lines []*progress.Object
	seen := map[digest.Digest]bool{}
	d := progress.New(os.Stderr)
	tick := time.NewTicker(progress.Interval)
	defer tick.Stop()
	for {
		select {
		case o, ok := <-expected:
			if !ok {
				if err := <-failed; err != nil {
					d.Draw(lines, true)
					return err
				}
				expected = nil
				break
			}
			if seen[o.digest] {
				continue
			}
			seen[o.digest] = true
			if err := o.look(s, true); err != nil {
				return err
			}
			objects, lines = append(objects, &o), append(lines, &o.Object)
			continue
		case <-tick.C:
		case <-ctx.Done():
			d.Draw(lines, true)
			return ctx.Err()
		}
		left := 0
		for _, o := range objects {
			if o.State < progress.Exists {
				if err := o.look(s, false); err != nil {
					return err
				}
			}
			if o.State < progress.Exists {
				left++
			}
		}
		complete := expected == nil && left == 0
		d.Draw(lines, complete)
		if complete {
			return nil
		}
	}
}

// look checks a blob that was not there the last time: one stat for the blob, one for its ingest.
func (o *object) look(s *content.Store, first bool) error {
	switch _, err := s.Path(o.digest); {
	case err == nil && first:
		o.State = progress.Exists
	case err == nil:
		o.State = progress.Done
	case !errdefs.IsNotFound(err):
		return err
	default:
		o.Offset = s.Offset(o.digest)
		if o.Offset > 0 {
			o.State = progress.Moving
		}
	}
	if o.State >= progress.Exists {
		o.Offset = o.Size
	}
	if first || o.Offset < o.First {
		o.First = o.Offset
	}
	return nil
}

// readExpected reads descriptors: JSON objects, or lines of digest, size and media type.
func readExpected(ctx context.Context, to chan<- object) error {
	in, err := cli.Stdin(ctx)
	if err != nil {
		return err
	}
	defer in.Close()
	r := bufio.NewReader(in)
	next := func() (d ocispec.Descriptor, err error) {
		line, err := r.ReadSlice('\n')
		if len(line) == 0 {
			return d, err
		}
		fields := strings.SplitN(strings.TrimSuffix(string(line), "\n"), "\t", 3)
		if len(fields) < 3 {
			return d, fmt.Errorf("%.80q has no three fields", line)
		}
		d.Digest, d.MediaType = digest.Digest(fields[0]), fields[2]
		d.Size, err = strconv.ParseInt(fields[1], 10, 64)
		return d, err
	}
	if b, _ := r.Peek(1); string(b) == "{" {
		dec := json.NewDecoder(r)
		next = func() (d ocispec.Descriptor, err error) {
			err = dec.Decode(&d)
			return d, err
		}
	}
	for {
		d, err := next()
		if err == io.EOF {
			return nil
		} else if err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			return cli.Usagef("standard input has no descriptors: %v", err)
		}
		if err := content.Validate(d.Digest); err != nil {
			return err
		}
		select {
		case to <- object{progress.Object{Name: progress.Name(d), Size: max(d.Size, 0)}, d.Digest}:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
