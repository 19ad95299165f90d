"""Statistics of guides and models: functions of result trees and arrays that return xarray data."""
