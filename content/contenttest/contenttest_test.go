package contenttest_test

import (
	"os"
	"testing"

	"distkit/content/contenttest"
)

func TestMain(m *testing.M) {
	contenttest.Main()
	os.Exit(m.Run())
}

func TestStore(t *testing.T) { contenttest.Run(t) }
