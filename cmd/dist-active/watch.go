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
	"distkit/content"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// interval is how often the store is looked at and drawn.
const interval = 100 * time.Millisecond

type state int

const (
	waiting state = iota
	downloading
	exists // was in the store when first seen
	done
)

func (s state) String() string {
	return [...]string{"waiting", "downloading", "exists", "done"}[s]
}

// object is one expected blob.
type object struct {
	name   string
	digest digest.Digest
	size   int64
	state  state
	offset int64
	first  int64 // offset when first seen: what an earlier run had brought
}

// watch follows the blobs whose descriptors come on standard input until it has ended and
// all are in the store. It draws on standard error where that is a terminal.
func watch(ctx context.Context, s *content.Store) error {
	expected, failed := make(chan object), make(chan error, 1)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		defer close(expected)
		failed <- readExpected(ctx, expected)
	}()

	var objects []*object
	seen := map[digest.Digest]bool{}
	d := newDisplay(os.Stderr)
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		select {
		case o, ok := <-expected:
			if !ok {
				if err := <-failed; err != nil {
					d.draw(objects, true)
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
			objects = append(objects, &o)
			continue
		case <-tick.C:
		case <-ctx.Done():
			d.draw(objects, true)
			return ctx.Err()
		}
		left := 0
		for _, o := range objects {
			if o.state < exists {
				if err := o.look(s, false); err != nil {
					return err
				}
			}
			if o.state < exists {
				left++
			}
		}
		complete := expected == nil && left == 0
		d.draw(objects, complete)
		if complete {
			return nil
		}
	}
}

// look asks the store about a blob that wasn't there the last time: one stat for the blob,
// one for its ingest.
func (o *object) look(s *content.Store, first bool) error {
	switch _, err := s.Path(o.digest); {
	case err == nil && first:
		o.state = exists
	case err == nil:
		o.state = done
	case !errdefs.IsNotFound(err):
		return err
	default:
		o.offset = s.Offset(o.digest)
		if o.offset > 0 {
			o.state = downloading
		}
	}
	if o.state >= exists {
		o.offset = o.size
	}
	if first || o.offset < o.first {
		o.first = o.offset
	}
	return nil
}

// readExpected reads descriptors: JSON objects, or digest, size and media type a line.
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
		case to <- object{name: name(d), digest: d.Digest, size: max(d.Size, 0)}:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// name is what a line begins with: layer-sha256:0123456789ab.
func name(d ocispec.Descriptor) string {
	kind := "blob"
	switch t := d.MediaType; {
	case strings.Contains(t, "image.index"), strings.Contains(t, "manifest.list"):
		kind = "index"
	case strings.Contains(t, "manifest"):
		kind = "manifest"
	case strings.Contains(t, "config"), strings.Contains(t, "container.image.v1"):
		kind = "config"
	case strings.Contains(t, "layer"), strings.Contains(t, "rootfs.diff"):
		kind = "layer"
	}
	return fmt.Sprintf("%s-%s:%.12s", kind, d.Digest.Algorithm(), d.Digest.Encoded())
}
