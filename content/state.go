package content

import (
	"context"
	"encoding"
	"encoding/json"

	"github.com/opencontainers/go-digest"
)

// saveEvery bounds what a resume after a kill has to hash again.
const saveEvery = 64 << 20

// maxState bounds the file of a hash's state, in bytes.
const maxState = 64 << 10

// hashState is the stored state of a hash at an offset of data: distkit-layout(5), INGESTS.
type hashState struct {
	Algorithm digest.Algorithm `json:"algorithm"`
	Offset    int64            `json:"offset"`
	Boot      string           `json:"boot"`
	State     []byte           `json:"state"`
}

// restoreHash hashes the data that is stored, from the stored state on if that can be believed. It is false if the data can't be
// used: if no digest is expected, nothing would show what another boot has lost of it.
func (w *Writer) restoreHash(ctx context.Context) (bool, error) {
	from, ok := w.loadState()
	if !ok {
		if w.expected == "" {
			return false, nil
		}
		// It goes before anything is written: a later resume could believe it.
		if err := w.dropState(); err != nil {
			return false, err
		}
		w.hash, from = newHash(w.alg), 0
	}
	w.saved = from
	return true, hashRange(ctx, w.hash, w.data, from, w.offset)
}

func (w *Writer) loadState() (offset int64, ok bool) {
	b, err := w.s.Tree.ReadFile(w.file(stateFile), maxState)
	if err != nil {
		return 0, false
	}
	var st hashState
	if json.Unmarshal(b, &st) != nil || st.Algorithm != w.alg || st.Offset > w.offset ||
		st.Boot == "" || st.Boot != bootID() {
		return 0, false
	}
	h := newHash(w.alg)
	if h.(encoding.BinaryUnmarshaler).UnmarshalBinary(st.State) != nil {
		return 0, false
	}
	w.hash = h
	return st.Offset, true
}

// saveState stores the hash's state by rename. It only saves the next resume time, and counts for this boot alone: so nothing is
// synced, and a failure is no error.
func (w *Writer) saveState() {
	state, err := w.hash.(encoding.BinaryMarshaler).MarshalBinary()
	if err != nil {
		return
	}
	b, err := json.Marshal(hashState{w.alg, w.offset, bootID(), state})
	if err != nil {
		return
	}
	tmp := stateFile + ".tmp"
	if w.write(tmp, string(b)+"\n") != nil || w.s.Tree.Rename(w.file(tmp), w.file(stateFile)) != nil {
		_ = w.s.Tree.Remove(w.file(tmp))
		return
	}
	w.saved = w.offset
}

func (w *Writer) dropState() error { return w.s.discard(w.file(stateFile)) }
