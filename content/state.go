package content

import (
	"context"
	"encoding"
	"encoding/json"

	"github.com/opencontainers/go-digest"
)

// saveEvery is the number of bytes after which the hash's state is saved. It bounds what a resume after a crash has to
// hash again.
const saveEvery = 64 << 20

// maxState bounds the size of the state file in bytes.
const maxState = 64 << 10

// hashState is the saved state of a hash over the first Offset bytes of data (distkit-layout(5), INGESTS).
type hashState struct {
	Algorithm digest.Algorithm `json:"algorithm"`
	Offset    int64            `json:"offset"`
	Boot      string           `json:"boot"`
	State     []byte           `json:"state"`
}

// restoreHash computes the hash of the stored data, starting from the saved state if that can be trusted. It returns
// false if the data can't be used: without a saved state of this boot, a power failure may have damaged the data, and
// without an expected digest nothing would show that.
func (w *Writer) restoreHash(ctx context.Context) (bool, error) {
	from, ok := w.loadState()
	if !ok {
		if w.expected == "" {
			return false, nil
		}
		// Remove the state before anything is written, so that no later resume trusts it.
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

// saveState saves the hash's state. It only makes the next resume faster, and is valid for this boot only. So it is not
// synced, and errors are ignored.
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
