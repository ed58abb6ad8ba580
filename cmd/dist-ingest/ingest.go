package main

import (
	"context"
	"errors"
	"io"
	"os"

	"distkit/cmd/internal/cli"
	"distkit/content"
	"distkit/errclass"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// ingest describes one call of the command.
type ingest struct {
	ref      string
	expected digest.Digest
	size     int64 // -1: not known
	keep     bool
	wait     bool
	command  []string // nil for standard input
}

func (in *ingest) run(ctx context.Context, s *content.Store) (record, error) {
	w, err := in.open(ctx, s)
	if errdefs.IsAlreadyExists(err) {
		return in.stored(ctx, s)
	}
	if err != nil {
		return record{}, err
	}
	r, err := in.fill(ctx, w)
	switch {
	case err == nil:
		return r, nil
	case errdefs.IsDataLoss(err) && !in.keep, w.Offset() == 0:
		return record{}, errors.Join(err, w.Abort())
	}
	return record{}, errors.Join(err, w.Close())
}

func (in *ingest) open(ctx context.Context, s *content.Store) (*content.Writer, error) {
	if in.expected == "" || !in.wait {
		return s.Writer(ctx, in.ref, in.size, in.expected)
	}
	return s.Writer(ctx, in.ref, in.size, in.expected, content.Wait)
}

// stored reports success for a blob that the store has already.
func (in *ingest) stored(ctx context.Context, s *content.Store) (record, error) {
	f, err := s.File(in.expected)
	if err != nil {
		return record{}, err
	}
	defer f.Close()
	if in.size >= 0 && f.Size() != in.size {
		return record{}, in.wrongSize()
	}
	return record{in.expected, f.Size()}, nil
}

func (in *ingest) wrongSize() error {
	return errclass.Errorf(errdefs.ErrDataLoss, "ingest %s: size mismatch: expected %d bytes", in.ref, in.size)
}

// fill reads the content into the writer and commits it.
func (in *ingest) fill(ctx context.Context, w *content.Writer) (record, error) {
	if in.command != nil {
		return in.fromCommand(ctx, w)
	}
	return in.fromStdin(ctx, w)
}

// fromStdin stores standard input. It discards what an earlier attempt has left, since this stream begins at the
// beginning.
func (in *ingest) fromStdin(ctx context.Context, w *content.Writer) (record, error) {
	if err := w.Truncate(0); err != nil {
		return record{}, err
	}
	if in.size != 0 {
		cloned, err := w.CloneFrom(ctx, os.Stdin)
		if err != nil {
			return record{}, err
		}
		if cloned {
			return in.commit(ctx, w)
		}
	}
	stdin, err := cli.Stdin(ctx)
	if err != nil {
		return record{}, err
	}
	defer stdin.Close()
	if err := content.Copy(ctx, in.sink(w), stdin); err != nil {
		return record{}, err
	}
	return in.commit(ctx, w)
}

func (in *ingest) commit(ctx context.Context, w *content.Writer) (record, error) {
	r := record{in.expected, w.Offset()}
	if in.expected == "" {
		r.Digest = w.Digest()
	}
	err := w.Commit(ctx, in.size, in.expected, nil)
	if err != nil && !errdefs.IsAlreadyExists(err) {
		return record{}, err
	}
	return r, nil
}

// sink returns the writer, with a check for an expected size of 0: [content.Store.Writer] takes that for an unknown
// size.
func (in *ingest) sink(w *content.Writer) io.Writer {
	return sink(func(p []byte) (int, error) {
		if in.size == 0 && len(p) > 0 {
			return 0, in.wrongSize()
		}
		return w.Write(p)
	})
}

type sink func(p []byte) (int, error)

func (s sink) Write(p []byte) (int, error) { return s(p) }
