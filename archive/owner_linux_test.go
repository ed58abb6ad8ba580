package archive

import "testing"

func TestKeptOwners(t *testing.T) {
	for value, want := range map[string][3]uint32{
		"\x08\x01\x10\x02":                     {1, 2, 1},
		"\x08\xac\x02\x10\x80\xd0\xac\xf3\x0e": {300, 4000000000, 1},
		"":                                     {0, 0, 1},
		"\x10\x05":                             {0, 5, 1},
		"\x08\xff\xff\xff\xff\x0f\x10\x05":     {0, 5, 1}, // as umoci writes it
		"\x08":                                 {},
		"\x08\xff":                             {},
		"\x0a\x01x":                            {},
		"\x18\x01":                             {},
		"\x08\x80\x80\x80\x80\x10":             {},
		"\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01": {},
	} {
		uid, gid, ok := decodeOwner([]byte(value))
		if ok != (want[2] == 1) || ok && (uid != want[0] || gid != want[1]) {
			t.Errorf("%q is %d:%d %v, not %v", value, uid, gid, ok, want)
		}
		if again := encodeOwner(uid, gid); ok && uid != 0 && string(again) != value {
			t.Errorf("%d:%d is %q, not %q", uid, gid, again, value)
		}
	}
}
