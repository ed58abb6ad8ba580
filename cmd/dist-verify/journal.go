package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"

	"distkit/content"
	"distkit/disk"
	"distkit/errclass"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// header is the first line of a journal. A file without it is not a journal, and is not written to.
const header = "# dist-verify: blobs that were found right\n"

// journal keeps the digests of verified blobs in a file, one a line, so that an interrupted run can continue. A nil
// journal keeps nothing.
type journal struct {
	file *os.File
	mu   sync.Mutex
	done map[digest.Digest]bool
}

// openJournal locks and reads the file. Unavailable: another process uses it. FailedPrecondition: it is not a journal.
func openJournal(path string) (*journal, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o644)
	if err != nil {
		return nil, fmt.Errorf("journal: %w", err)
	}
	j := &journal{file: f, done: map[digest.Digest]bool{}}
	if err := j.read(); err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("journal %s: %w", path, err)
	}
	return j, nil
}

func (j *journal) read() error {
	err := disk.Lock(j.file, unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return disk.Busy(j.file)
	}
	if err != nil {
		return err
	}
	lines := bufio.NewReader(j.file)
	first, err := lines.ReadString('\n')
	if err != nil && err != io.EOF {
		return err
	}
	switch {
	case first == header:
	case strings.HasPrefix(header, first): // new, or its first write was cut
		if err := j.file.Truncate(0); err != nil {
			return err
		}
		_, err = j.file.WriteString(header)
		return err
	default:
		return errclass.As(errors.New("is not one of dist-verify"), errdefs.ErrFailedPrecondition)
	}
	for {
		line, err := lines.ReadString('\n')
		if err == io.EOF && line == "" {
			return nil
		}
		if err == io.EOF {
			_, err = j.file.WriteString("\n") // a killed process has left an incomplete line
			return err
		}
		if err != nil {
			return err
		}
		if dgst := digest.Digest(strings.TrimSuffix(line, "\n")); content.Validate(dgst) == nil {
			j.done[dgst] = true
		}
	}
}

// has reports whether the blob was verified before.
func (j *journal) has(dgst digest.Digest) bool {
	return j != nil && j.done[dgst]
}

// add records that a blob is valid.
func (j *journal) add(dgst digest.Digest) error {
	if j == nil {
		return nil
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	if _, err := j.file.WriteString(string(dgst) + "\n"); err != nil {
		return fmt.Errorf("journal: %w", err)
	}
	return nil
}

// close closes the journal. If complete, it deletes the file.
func (j *journal) close(complete bool) error {
	if j == nil {
		return nil
	}
	var err error
	if complete {
		err = os.Remove(j.file.Name())
	}
	return errors.Join(err, j.file.Close())
}
