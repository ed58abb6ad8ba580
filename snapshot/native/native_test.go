package native_test

import (
	"testing"

	"distkit/snapshot/native"
	"distkit/snapshot/snapshottest"
)

func TestMain(m *testing.M) { snapshottest.Main(m, native.Driver{}) }

func TestSuite(t *testing.T) { snapshottest.Run(t, native.Driver{}) }
